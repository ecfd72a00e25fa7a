"""Our ops inside models that other libraries built. Public names: ``vitfast.accelerate``, ``report`` and ``restore``.

The package is not called accelerate, so that importing it (which unpickling an accelerated model does) never puts a module
in the place of the function ``vitfast.accelerate``.
"""
