"""Chooses the layers that should keep full attention. The engine measures the quantized model, without torch.

- `calibration`: the function `calibrate`.
- `recommendation`: the function `recommend`. Chooses one of the configurations that `eval` measured.
- `settings`: the settings of a calibration.
- `search`: rankings of single layers, and the greedy search.
- `losses`: the loss of reference answers under a choice of layers.
- `cases`: the samples to measure, from retrieval tasks or from a text.
- `report`: the result as JSON, as text and as a picture.
"""

from swaa_edge.calibrate.calibration import Calibration, calibrate
from swaa_edge.calibrate.recommendation import recommend

__all__ = ["Calibration", "calibrate", "recommend"]
