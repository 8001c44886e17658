"""What the trainer is asked to do on the way: draw its curves, stop at a chosen step."""

import math
import time
from uuid import uuid4

from IPython import get_ipython
from IPython.display import HTML, display
from transformers import TrainerCallback

from utils.plots import figure_html, training_curves


class LiveCurves(TrainerCallback):
    """Redraws `training_curves` in one place of the notebook while the trainer runs; does nothing outside of IPython."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.place, self.drawn = uuid4().hex, -math.inf

    def on_log(self, args, state, control, **kwargs):
        if (
            time.monotonic() - self.drawn >= 1
        ):  # a picture takes longer than a step of a small model
            self.on_train_end(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        if get_ipython() is not None:
            page = HTML(figure_html(training_curves(state.log_history)))
            display(page, display_id=self.place, update=self.drawn > 0)
            self.drawn = time.monotonic()


class StopAfter(TrainerCallback):
    """Saves and ends training after `step` steps although more are planned: what a lost connection does, at a chosen moment."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
