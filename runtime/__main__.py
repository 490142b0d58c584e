"""List the commands of `runtime`."""

from runtime.core.command_list import overview

print(overview("runtime"))
