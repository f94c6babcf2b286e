from .prompt_sets import SPLITS as SPLITS
from .prompt_sets import PromptSet as PromptSet
from .prompt_sets import Templates as Templates
from .task import Task as Task
from .task import load_task as load_task
from .task import task_names as task_names
