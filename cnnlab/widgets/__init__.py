"""Panels for JupyterLab: controls that make a recipe, Run and Stop, and a live picture."""

from cnnlab.widgets.board import Panel, slider
from cnnlab.widgets.panels import LadderPanel, ScalingPanel, TrainingPanel
from cnnlab.widgets.picture import Picture
from cnnlab.widgets.prediction import Prediction
from cnnlab.widgets.strategies import StrategyPanel
