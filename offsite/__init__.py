"""Fine-tune a model that may not leave its owner on data that may not leave theirs."""
