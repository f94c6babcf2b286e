"""Work in many processes: jobs, Ray workers, batches."""

import lazy_loader

# The names stand in __init__.pyi, once; a name is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
