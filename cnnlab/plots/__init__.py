"""Pure `draw(ax, data)` functions on empty axes, the same for live, recorded and tested runs."""

from cnnlab.plots.batch_size import batch_size_curve
from cnnlab.plots.memory import memory_bars, traffic_bars
from cnnlab.plots.pipeline import schedule_diagram
from cnnlab.plots.prediction import prediction_curve
from cnnlab.plots.profiling import profile_timeline
from cnnlab.plots.runs import accuracy, loss, loss_curve, throughput
from cnnlab.plots.scaling import scaling_curve
from cnnlab.plots.speed import ladder_bars, roofline, speedup_bars
from cnnlab.plots.style import COLORS, PHASES, PREDICTED, RECORDED, REJECTED, machine_label
from cnnlab.plots.timeline import rank_timeline, step_breakdown
