"""Panels: controls that make a recipe, Run, Stop, and what comes of it live."""

from cnnlab.widgets.board import Panel, Picture, slider
from cnnlab.widgets.panels import LadderPanel, ScalingPanel, TrainingPanel
from cnnlab.widgets.prediction import Prediction

__all__ = [
    "LadderPanel",
    "Panel",
    "Picture",
    "Prediction",
    "ScalingPanel",
    "TrainingPanel",
    "slider",
]
