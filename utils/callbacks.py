"""Callbacks for the trainer: draw its curves live, or stop at a chosen optimizer step."""

import math
import time
from uuid import uuid4

from IPython import get_ipython
from IPython.display import HTML, display
from transformers import TrainerCallback

from utils.plots import figure_html, training_curves


class LiveCurves(TrainerCallback):
    """Redraw `training_curves` in one place of the notebook; do nothing outside of IPython."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.place = uuid4().hex
        self.drawn = -math.inf

    def on_log(self, args, state, control, **kwargs):
        # Drawing takes longer than an optimizer step of a small model.
        if time.monotonic() - self.drawn >= 1:
            self.draw(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.draw(state)

    def draw(self, state):
        """Draw the curves, or replace those drawn before."""
        if get_ipython() is None:
            return
        page = HTML(figure_html(training_curves(state.log_history)))
        display(page, display_id=self.place, update=self.drawn > 0)
        self.drawn = time.monotonic()


class StopAfter(TrainerCallback):
    """Save and stop after `step` optimizer steps, as a lost connection does at a chosen moment."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True
