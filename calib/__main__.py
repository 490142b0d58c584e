"""List the commands of `calib`."""

from runtime.core.command_list import overview

print(overview("calib"))
