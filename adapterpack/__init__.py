"""adapterpack: convert, compress, verify and merge fine-tuned adapter checkpoints, with proof.

The verbs of the command line are functions here; each returns a frozen dataclass. Importing this costs no
torch: that is loaded when maths begins.
"""

from adapterpack.check import Health, check
from adapterpack.compress import compress
from adapterpack.convert import Conversion, convert
from adapterpack.errors import AdapterpackError
from adapterpack.extract import ExtractedModule, Extraction, extract
from adapterpack.inspect import Inspection, inspect
from adapterpack.merge import Merge, merge
from adapterpack.verify import Verification, verify
from adapterpack.version import __version__

__all__ = [
    "AdapterpackError",
    "Conversion",
    "ExtractedModule",
    "Extraction",
    "Health",
    "Inspection",
    "Merge",
    "Verification",
    "__version__",
    "check",
    "compress",
    "convert",
    "extract",
    "inspect",
    "merge",
    "verify",
]
