"""The panel of a cluster on paper: choose devices, network and batch, and the prediction moves."""

import copy
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
import numpy as np
from many_machines.published import TABLES

from cnnlab import predict
from cnnlab.plots import COLORS, prediction_curve
from cnnlab.widgets import Picture

DEVICES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000, 32_768, 100_000]
UNCHANGED = "published"
# {what to buy: (section of the spec, field, factor)}
PURCHASES = {
    "network\nbandwidth x 2": ("network", "bandwidth_gbps", 2.0),
    "bandwidth in\nthe node x 2": ("node", "bandwidth_gbps", 2.0),
    "network\nlatency / 2": ("network", "latency_us", 0.5),
    "device\nspeed x 2": ("device", "images_per_s", 2.0),
}


def change_spec(spec: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a spec; `network__latency_us=5` changes spec["network"]["latency_us"]."""
    new = copy.deepcopy(dict(spec))
    for path, value in changes.items():
        *sections, field = path.split("__")
        target = new
        for section in sections:
            target = target[section]
        target[field] = value
    return new


def gains(spec: Mapping[str, Any], devices: int) -> dict[str, float]:
    """{what to buy: predicted speedup of the whole cluster of that many devices}."""

    def rate(changed):
        return predict({**changed, "devices": [devices]})["predictions"][0]["images_per_s"]

    before = rate(spec)
    found = {}
    for name, (section, field, factor) in PURCHASES.items():
        better = change_spec(spec, **{f"{section}__{field}": spec[section][field] * factor})
        found[name] = rate(better) / before
    return found


def time_to_accuracy(
    predictions: list[dict[str, Any]], batch: int, critical_batch: float
) -> np.ndarray:
    """Speedup of the time to a given accuracy over one device, for each prediction.

    With global batch B the training needs S = S_min (1 + B_crit / B) steps: McCandlish et al., "An
    Empirical Model of Large-Batch Training" (2018). `batch`: images per device and step.
    """
    step_s = np.array([row["step_s"] for row in predictions])
    global_batch = batch * np.array([row["devices"] for row in predictions])
    seconds = step_s * (1 + critical_batch / global_batch)
    return seconds[0] / seconds


class ClusterPanel(widgets.VBox):
    """Controls of a cluster and three plots that follow them; nothing is trained.

    Left: where the time of a step goes, for 1 to 100,000 devices, with published measurements.
    Middle: speedup in images/s, and in time to the same accuracy. Right: what to buy first.
    `.spec` is the spec, `.result` what `predict` says about it.
    """

    def __init__(self, start: str = TABLES[0].name) -> None:
        self.tables = {f"{table.name} ({table.stack})": table for table in TABLES}
        first = next(name for name in self.tables if name.startswith(start))
        wide = {"layout": {"width": "520px"}, "style": {"description_width": "110px"}}
        narrow = {"layout": {"width": "330px"}, "style": {"description_width": "150px"}}
        narrow["continuous_update"] = False
        networks = [UNCHANGED, 1, 10, 25, 100, 200, 400, 800, 1600, 3200]
        self.cluster = widgets.Dropdown(options=list(self.tables), value=first, **wide)
        self.cluster.description = "cluster"
        self.network = widgets.SelectionSlider(options=networks, **narrow)
        self.network.description = "network, Gbit/s"
        batches = [UNCHANGED, 16, 32, 64, 128, 256, 512, 1024]
        self.batch = widgets.SelectionSlider(options=batches, **narrow)
        self.batch.description = "batch per device"
        self.accumulate = widgets.SelectionSlider(options=[1, 2, 4, 8, 16], **narrow)
        self.accumulate.description = "micro-batches"
        self.devices = widgets.SelectionSlider(options=DEVICES, value=1024, **narrow)
        self.devices.description = "devices to buy for"
        critical = [500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000]
        self.critical = widgets.SelectionSlider(options=critical, value=5000, **narrow)
        self.critical.description = "critical batch size"
        self.overlap = widgets.Checkbox(True, description="overlap with backward", indent=False)
        self.controls = {
            "cluster": self.cluster,
            "network": self.network,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "devices": self.devices,
            "critical": self.critical,
            "overlap": self.overlap,
        }
        self.picture = Picture(3, (12, 3.8))
        for ax, left, width in zip(
            self.picture.axes, (0.05, 0.42, 0.78), (0.3, 0.25, 0.2), strict=True
        ):
            ax.set_position((left, 0.15, width, 0.78))
        fitting = {"max_width": "100%", "object_fit": "contain"}
        self.image = widgets.Image(format="png", layout=fitting).add_class("cnnlab-picture")
        self.status = widgets.HTML().add_class("cnnlab-status")
        for name, control in self.controls.items():
            control.add_class(f"cnnlab-{name}")
            control.observe(self.update, "value")
        rows = widgets.Box(list(self.controls.values()), layout={"flex_flow": "row wrap"})
        super().__init__([rows, self.status, self.image])
        self.add_class("cnnlab-panel")
        self.update()

    @property
    def table(self) -> Any:
        """The published table that the cluster starts from."""
        return self.tables[self.cluster.value]

    @property
    def spec(self) -> dict[str, Any]:
        changes = {"overlap": self.overlap.value, "accumulate": self.accumulate.value}
        if self.network.value != UNCHANGED:
            changes["network__bandwidth_gbps"] = self.network.value
        if self.batch.value != UNCHANGED:
            changes["device__batch"] = self.batch.value
        return change_spec(self.table.spec, **changes, devices=DEVICES)

    def update(self, _: Any = None) -> None:
        """Predict and draw again with the current values of the controls."""
        self.result = predict(self.spec)
        self.image.value = self.picture.png(self._draw)
        row = self._chosen()
        self.status.value = (
            f"{row['devices']:,} devices: {row['images_per_s']:,.0f} images/s, a speedup of "
            f"<b>{row['speedup']:,.0f}</b> over one device, efficiency {row['efficiency']:.0%}. "
            f"Bound by {row['bound_by']}."
        )

    def _chosen(self):
        rows = self.result["predictions"]
        return next(row for row in rows if row["devices"] == self.devices.value)

    def _draw(self, axes):
        predictions = self.result["predictions"]
        unchanged = (self.network.value, self.batch.value) == (UNCHANGED, UNCHANGED)
        label = f"published: {self.table.source}" if unchanged else "published, unchanged cluster"
        prediction_curve(axes[0], predictions, {label: self.table.measured})
        axes[0].set_xticks([1, 100, 10_000])
        axes[0].axvline(self.devices.value, color="black", linestyle=":", linewidth=1)
        self._draw_speedups(axes[1], predictions)
        self._draw_purchases(axes[2])

    def _draw_speedups(self, ax, predictions):
        devices = [row["devices"] for row in predictions]
        spec = self.spec
        batch = spec["device"]["batch"] * spec["accumulate"]
        accurate = time_to_accuracy(predictions, batch, self.critical.value)
        ax.loglog(devices, devices, "--", color="gray", label="ideal")
        ax.loglog(devices, [row["speedup"] for row in predictions], label="images/s")
        ax.loglog(devices, accurate, color=COLORS[1], label="time to the same accuracy")
        ax.set(xlabel="devices", ylabel="speedup over one device")
        ax.legend(fontsize=9, frameon=False)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)

    def _draw_purchases(self, ax):
        found = gains(self.spec, self.devices.value)
        percent = [100 * (gain - 1) for gain in found.values()]
        ax.barh(range(len(found)), percent, color=COLORS[2], height=0.6)
        for row, value in enumerate(percent):
            ax.text(value, row, f" +{value:.0f}%", va="center", fontsize=9)
        ax.set_yticks(range(len(found)), list(found), fontsize=9)
        ax.set(
            xlim=(0, 1.3 * max(*percent, 10)),
            xlabel=f"more images/s, {self.devices.value:,} devices",
        )
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
