"""Scripts that measure, and print what they measured; none of them is a test."""
