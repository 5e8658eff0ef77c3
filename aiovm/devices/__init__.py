"""The emulated devices, one chip a module."""
