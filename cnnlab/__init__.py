"""cnnlab: build one CNN, then make its training faster, one technique at a time.

Every technique is measured live on your machine. `__init__.pyi` lists the public names; each is
imported when it is first used, so that `import cnnlab` needs neither torch nor Jupyter.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
