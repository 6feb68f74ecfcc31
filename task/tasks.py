"""The table of tasks by the names that configurations use."""

from offsite.task.causal_lm import CausalLM
from offsite.task.chat import Chat
from offsite.task.clip_model import ClipClassification
from offsite.task.diffusion import ClassToImage, TextToImage
from offsite.task.extractive_qa import ExtractiveQA
from offsite.task.image_classification import ImageClassification
from offsite.task.image_prompt import ImagePromptToImage
from offsite.task.llava import ImageText
from offsite.task.prompt_completion import PromptCompletion
from offsite.task.seq2seq import Seq2Seq
from offsite.task.sequence_classification import SequenceClassification
from offsite.task.spec import Task
from offsite.task.token_classification import TokenClassification

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
