"""How large a thing from a file may be before we refuse to look at it.

Real adapters stay far below every number; hostile files are refused before they cost memory or time.
"""

HEADER_BYTES = 16 << 20
"""Longest safetensors header read (the format itself allows 100 MB)."""
TENSORS = 200_000
"""Most tensors in one file."""
NAME_BYTES = 512
"""Longest tensor name, in UTF-8 bytes."""
RANK = 8
"""Most dimensions of a tensor."""
DIMENSION = 1 << 31
"""Largest dimension of a tensor."""
METADATA_BYTES = 1 << 20
"""Longest `__metadata__`, names and values together."""
JSON_DEPTH = 32
"""Deepest nesting of a JSON document."""
CONFIG_BYTES = 4 << 20
"""Longest adapter_config.json or config.json."""
INDEX_BYTES = 64 << 20
"""Longest model.safetensors.index.json."""
SHARDS = 10_000
"""Most shards of one base model."""
PATTERN_CHARS = 2_000
"""Longest regular expression taken from a file."""
PATTERN_SECONDS = 1.0
"""Longest time that one regular expression from a file may run on one name."""
PATTERNS_SECONDS = 10.0
"""Longest time that all expressions of one field may run on all names."""
PATTERNS = 10_000
"""Most patterns in one rank_pattern or alpha_pattern."""
LORA_RANK = 65_536
"""Largest rank of an adapter."""
CHANGE_ELEMENTS = 1 << 33
"""Most elements of a change that small tensors stand for, as Kronecker products do: beyond it nothing is computed."""
CARRIED_BYTES = 64 << 20
"""Largest tokenizer, text or config file that is carried along with an adapter."""
CHUNK_BYTES = 4 << 20
"""How much is copied, hashed or scanned at a time."""
RECIPE_ELEMENTS = 1 << 28
"""Most elements that a recipe may draw: beyond it the recipe is refused before it is run."""
PERMUTATION = 1 << 32
"""Most elements of a weight that places are drawn from."""
ZSTD_WINDOW_LOG = 23
"""Largest window of a zstd frame: 8 MiB."""
MANIFEST_BYTES = 64 << 20
"""Longest manifest of a pack, decompressed."""
MANIFEST_LISTS = 1 << 22
"""Most brackets in a manifest: an empty list is three bytes of it and sixty of memory."""
FRAME_BYTES = 64 << 20
"""Most bytes that one frame of a pack holds, decompressed."""
FRAMES = 1 << 20
"""Most frames of one pack."""
PACK_BYTES = 10**12
"""Largest pack, and most bytes that one file of it restores to... each is stated, and checked before work."""
PARENTS = 64
"""Longest chain of packs that are each stored as a difference to the one before."""
REPO_FILES = 100_000
"""Most files of one repository of the Hub."""
CARD_BYTES = 1 << 20
"""Longest model card that is mended."""
PROMPTS_BYTES = 4 << 20
"""Largest file of prompts."""
PROMPTS = 1_000
"""Most prompts that models are run on."""
PROMPT_TOKENS = 4_096
"""Longest prompt."""
OUTPUT_BYTES = 4 << 30
"""Most bytes of one model's answers that are kept for comparison."""
