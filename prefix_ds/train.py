"""`prefix-ds train`: a run from its configuration to its result.

Reads like a table of contents: the world, the run folder, the tokenizer and the data, the base in shards, what is
trained, where it goes on, the loop. Nothing here is done twice: each line names the room that does it.
"""

import logging

log = logging.getLogger(__name__)
