"""List the commands of `export`."""

from runtime.core.command_list import overview

print(overview("export"))
