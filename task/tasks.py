"""The table of tasks."""

from task.causal_lm import CausalLM
from task.chat import Chat
from task.clip import ClipClassification
from task.diffusion import ClassToImage, TextToImage
from task.extractive_qa import ExtractiveQA
from task.image_classification import ImageClassification
from task.image_prompt import ImagePromptToImage
from task.llava import ImageText
from task.prompt_completion import PromptCompletion
from task.seq2seq import Seq2Seq
from task.sequence_classification import SequenceClassification
from task.spec import Task
from task.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    "causal_lm": CausalLM(),
    "prompt_completion": PromptCompletion(),
    "chat": Chat(),
    "sequence_classification": SequenceClassification(),
    "token_classification": TokenClassification(),
    "extractive_qa": ExtractiveQA(),
    "seq2seq": Seq2Seq(),
    "image_classification": ImageClassification(),
    "clip_classification": ClipClassification(),
    "image_text": ImageText(),
    "class_to_image": ClassToImage(),
    "text_to_image": TextToImage(),
    "image_prompt_to_image": ImagePromptToImage(),
}
