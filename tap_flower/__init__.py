"""TAP (Two-Stage Adaptive Personalization, arXiv 2509.26524) for federated learning with Flower.

The names below are the public interface. Each is imported when it is first used, so that `import tap_flower` costs nothing,
and none but `PersonalModel` imports transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tap_flower.client.app import TapClientApp as TapClientApp
    from tap_flower.client.task import Client as Client
    from tap_flower.client.task import Task as Task
    from tap_flower.config import Config as Config
    from tap_flower.config import load_config as load_config
    from tap_flower.core.components import ComponentMap as ComponentMap
    from tap_flower.core.components import Pair as Pair
    from tap_flower.core.tasks import IMAGE_CLASSIFICATION as IMAGE_CLASSIFICATION
    from tap_flower.core.tasks import IMAGE_GENERATION as IMAGE_GENERATION
    from tap_flower.core.tasks import TEXT_CLASSIFICATION as TEXT_CLASSIFICATION
    from tap_flower.core.tasks import TEXT_GENERATION as TEXT_GENERATION
    from tap_flower.core.tasks import TaskKind as TaskKind
    from tap_flower.personal.own_modules import load_module as load_module
    from tap_flower.personal.own_modules import load_personal as load_personal
    from tap_flower.personal.personal_model import PersonalModel as PersonalModel
    from tap_flower.server.result import TapResult as TapResult
    from tap_flower.server.strategy import TapStrategy as TapStrategy

__version__ = "0.2.0"

_HOMES = {
    "tap_flower.config": ("Config", "load_config"),
    "tap_flower.core.components": ("ComponentMap", "Pair"),
    "tap_flower.core.tasks": (
        "IMAGE_CLASSIFICATION",
        "IMAGE_GENERATION",
        "TEXT_CLASSIFICATION",
        "TEXT_GENERATION",
        "TaskKind",
    ),
    "tap_flower.client.app": ("TapClientApp",),
    "tap_flower.server.result": ("TapResult",),
    "tap_flower.server.strategy": ("TapStrategy",),
    "tap_flower.personal.personal_model": ("PersonalModel",),
    "tap_flower.client.task": ("Client", "Task"),
    "tap_flower.personal.own_modules": ("load_module", "load_personal"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    """Imports a public name from where it is defined."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
