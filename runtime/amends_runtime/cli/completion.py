"""`amends completion`: what a shell needs to complete commands, options and their values."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

__all__ = ["completion"]


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(name="SHELL")], /
) -> None:
    """Print a script that lets a shell complete amends' commands and options.

    Ids of sagas and names of definitions and participants are asked of the
    runtime that the command would talk to.

    Nothing of yours is edited: put the line for your shell where it belongs, and
    open a new shell.

    For example:

      echo 'source <(amends completion bash)' >> ~/.bashrc
      amends completion zsh > "${fpath[1]}/_cyclopts_amends"
      amends completion fish > ~/.config/fish/completions/amends.fish

    Parameters
    ----------
    shell:
        Which shell.
    """
    from amends_runtime.cli.app import build_app  # noqa: PLC0415  # it imports this module

    sys.stdout.write(build_app().generate_completion(prog_name="amends", shell=shell))
