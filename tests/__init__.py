"""What must be true of prefix-ds."""
