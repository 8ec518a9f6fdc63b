"""Stand-ins for libraries that are not installed and that the measured work never calls.

The train step and the encoders import modules that, elsewhere, read data and write files.  On a machine that has JAX, Flax and
Optax alone these imports are met by empty names, and calling one says which library is missing.  ConfigDict alone does something.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

NAMES = (
    *("cv2", "simplejpeg", "ftfy", "regex", "orbax", "etils", "grain", "tensorflow_datasets", "tensorboardX", "tqdm", "fsspec"),
    *("pyarrow", "tokenizers", "huggingface_hub", "matplotlib", "safetensors", "ml_collections"),
)
HARMLESS = ("setNumThreads",)  # what is called while a module is imported


def install() -> list[str]:
    """Puts stand-ins in the place of what is not installed, and gives the names."""
    absent = [name for name in NAMES if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Finder(absent))
    return absent


class _Nothing(type):
    """A class for any name: a base, an annotation, a decorator's argument; not to be called."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {"library": cls.library})

    def __call__(cls, *arguments, **named):
        if cls.__name__ in HARMLESS:
            return None
        if cls.__dict__.get("library"):
            raise ModuleNotFoundError(f"{cls.library} is not installed", name=cls.library)
        return super().__call__(*arguments, **named)


class ConfigDict(dict):
    """What the configuration needs of ml_collections: nested dictionaries with attributes."""

    def __init__(self, values=(), **options):
        super().__init__()
        for name, value in dict(values).items():
            self[name] = value

    def __setitem__(self, name, value):
        super().__setitem__(name, ConfigDict(value) if isinstance(value, dict) and not isinstance(value, ConfigDict) else value)

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]

    __setattr__ = __setitem__

    def to_dict(self) -> dict:
        return {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in self.items()}

    def unlock(self) -> "ConfigDict":
        return self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: list[str]):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        library = spec.name.partition(".")[0]
        if library == "ml_collections":
            module.ConfigDict = ConfigDict

        def attribute(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return _Nothing(name, (), {"library": library})

        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        pass
