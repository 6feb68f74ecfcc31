"""The table of tasks."""

from task.causal_lm import CausalLM
from task.spec import Task

TASKS: dict[str, Task] = {"causal_lm": CausalLM()}
