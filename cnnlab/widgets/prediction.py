"""A question to the learner before a measurement."""

from typing import Any

import ipywidgets as widgets


class Prediction(widgets.VBox):
    """A question that the learner answers with a number. `.value` is None before the answer."""

    def __init__(self, question: str, unit: str = "x", most: float = 1e6) -> None:
        self.value: float | None = None
        self.unit = unit
        self.box = widgets.BoundedFloatText(max=most, step=0.1, layout={"width": "110px"})
        self.button = widgets.Button(description="This is my guess", button_style="info")
        self.button.on_click(self.commit)
        self.answer = widgets.HTML()
        row = widgets.HBox([self.box, widgets.Label(unit), self.button, self.answer])
        super().__init__([widgets.HTML(f"<b>Predict:</b> {question}"), row])
        self.add_class("cnnlab-prediction")

    def commit(self, _: Any = None) -> None:
        """Fix the answer: a prediction cannot change after the measurement."""
        self.value = self.box.value
        self.box.disabled = True
        self.button.disabled = True
        self.answer.value = f"Your prediction: <b>{self.value:,.10g} {self.unit}</b>"
