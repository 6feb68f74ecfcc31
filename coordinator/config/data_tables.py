"""The tables [model], [data] and [[sites]] of the federation file: the inputs of a job."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelConfig:
    """The table [model]: the full model, and its task.

    Attributes:
      path: Hugging Face folder with safetensors weights; nothing is fetched.
      task: task that the model is trained for; a name in `task.tasks.TASKS`.
      base: name under which others load the full model, as `owner/name` of a hub or a path that they have; it stands in
        the exported adapter. Empty writes `./` and the name of the model's folder, for which no library asks a hub.
    """

    path: str
    task: str = "causal_lm"
    base: str = ""


@dataclass(frozen=True)
class DataConfig:
    """The table [data]: the coordinator's public records, and how all records become examples.

    Attributes:
      public: file or folder of public records, with the sites' fields, for gate, clip and acceptance test.
      length: number of tokens of one record, the unit of privacy; at least 2.
      split: way from texts to records; `truncate` makes one record of each text. `blocks` cuts each text into records
        of `length` tokens: no single person stands behind such a record, and the tokenizer decides their number.
      reader: name in `task.readers.tables.READERS`: jsonl, json, csv, tsv, parquet, arrow, text, npz, images or
        image_parquet; empty picks by file name.
      column: column or key that holds the main field of the task's records, for example the text; empty takes the
        field's name.
      columns: column or key of each further field, by the field's name, as `{ text = "body", label = "spam" }`.
      labels: name of the model's label for each value in the files, as `{ 1 = "benign", M80 = "malignant" }`; a value
        that is not in it is itself a name. Empty where the files hold the model's own labels.
    """

    public: str
    length: int = 128
    split: str = "truncate"
    reader: str = ""
    column: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteConfig:
    """One entry [[sites]]: a data owner of a simulation.

    Attributes:
      name: name of the site, of letters, digits, `-` and `_`.
      train: file or folder of the site's training records.
      heldout: file or folder of records of the same kind for scores; no site trains on them.
    """

    name: str
    train: str
    heldout: str
