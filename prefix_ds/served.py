"""A trained prefix as a model of MLflow: texts in, texts out.

MLflow keeps this file itself, run.yaml and the prefix, and runs the file when it loads the model: nothing is
a pickle. The base is the one that run.yaml names, by folder or by hub id and revision, and is never copied.
Texts are given to the model as they are, as with `prefix-ds generate --prompt`, and the section `generate` of
run.yaml says how it answers.

Knows nothing of where a model is stored.
"""

from pathlib import Path
from threading import Lock
from typing import Any

import mlflow

from prefix_ds.config import RunConfig
from prefix_ds.data.prompts import prompt_of_text, tell_cut
from prefix_ds.dist import lasting_world
from prefix_ds.exporting import open_slim
from prefix_ds.opening import open_trained
from prefix_ds.writing import write_outputs


class ServedPrefix(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """One process, one base, one prefix."""

    def load_context(self, context: Any) -> None:
        """Opens base and prefix. Raises PrefixError."""
        folder, config = open_slim(Path(context.artifacts["run"]))
        self.config: RunConfig = config
        self.opened = open_trained(folder, config, lasting_world())
        self.lock = Lock()

    def predict(self, model_input: list[str]) -> list[str]:
        """What is written for each prompt. One call at a time: MLflow's server has several threads."""
        with self.lock:  # writing changes the model for as long as it lasts
            return self._written(model_input)

    def _written(self, model_input: list[str]) -> list[str]:
        if not model_input:
            return []
        data, tokenizer = self.config.data, self.opened.tokenizer
        prompts = [prompt_of_text(text, data, tokenizer) for text in model_input]
        tell_cut(prompts, data.max_length)
        outputs = write_outputs(self.opened, prompts, self.config.generate, lasting_world())
        return [written.output for written in outputs]


mlflow.models.set_model(ServedPrefix())
