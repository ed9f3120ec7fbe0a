"""Panels: controls that make a recipe, and what comes of it live. Press Run, watch real training, move a slider, press Stop."""

import ipywidgets as widgets


class Prediction(widgets.VBox):
    """A question to answer with a number before measuring. `.value` is None until the learner commits to it."""

    def __init__(self, question, unit="x", least=0.0, most=1e6):
        self.value = None
        self.box = widgets.BoundedFloatText(
            value=least, min=least, max=most, step=0.1, layout={"width": "110px"}
        )
        self.button = widgets.Button(description="This is my guess", button_style="info")
        self.said = widgets.HTML()
        self.unit = unit
        self.button.on_click(self.commit)
        answer = widgets.HBox([self.box, widgets.Label(unit), self.button, self.said])
        super().__init__([widgets.HTML(f"<b>Predict:</b> {question}"), answer])
        self.add_class("cnnlab-prediction")

    def commit(self, _=None):
        """Fix the guess: a prediction that can be changed afterwards is none."""
        self.value = self.box.value
        self.box.disabled = self.button.disabled = True
        self.said.value = f"Your prediction: <b>{self.value:,.10g} {self.unit}</b>"
