"""The command line: one verb per file, each of which parses, calls and prints."""

from __future__ import annotations

from importlib import import_module

import click

from adapterpack.cli import _edge
from adapterpack.version import __version__

VERBS = (
    *("inspect", "check", "convert", "compress", "unpack", "resize", "combine", "extract", "verify", "diff"),
    *("merge", "push", "pull"),
)


class _Verbs(click.Group):
    """Verbs are imported when they are called, so that `--version` and `--help` cost nothing."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = import_module(f"adapterpack.cli.{cmd_name}_verb").command
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="adapterpack")
def cli() -> None:
    """Convert, compress, verify and merge fine-tuned adapter checkpoints, with proof.

    SRC and ADAPTER are PEFT directories (adapter_config.json beside adapter_model.safetensors), packs
    (.apack), or one .safetensors file with its config beside it; or lie on the Hugging Face Hub:
    org/name, org/name@revision/folder. A local path wins. Inputs are never modified.

    \b
    Exit codes: 0 done; 1 failed; 2 wrong usage; 3 verify or check found a difference or fault;
    4 refused, for it would lose more than was allowed; 130 interrupted; 143 terminated.
    """


def main() -> None:
    """The entry point: map every error to an exit code, once."""
    _edge.run(cli)
