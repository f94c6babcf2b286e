from .base import Engine as Engine
from .base import LanguageModel as LanguageModel
from .base import Outputs as Outputs
from .base import PrefixEngine as PrefixEngine
from .registry import load_language_model as load_language_model
from .tabular import TabularLM as TabularLM
from .transformers_lm import TransformersLM as TransformersLM
from .tree_engine import TreeEngine as TreeEngine
