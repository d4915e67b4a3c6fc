"""What trainer.tuning uses of keras-tuner beyond its documentation: a failure names the use."""

import grpc
import keras_tuner
import pytest
from keras_tuner.engine.trial import Trial
from keras_tuner.oracles import BayesianOptimizationOracle, HyperbandOracle, RandomSearchOracle

from trainer.tuning.keras_tuner_internals import serve_oracle


def test_an_oracle_can_be_served() -> None:
    """serve_oracle: OracleServicer, protos."""
    service = serve_oracle(grpc.server(None), RandomSearchOracle())
    assert service.stop_triggered is False


@pytest.mark.parametrize(
    "oracle", [RandomSearchOracle, BayesianOptimizationOracle, HyperbandOracle]
)
def test_the_state_of_an_oracle(oracle: type[keras_tuner.Oracle]) -> None:
    """_Durable.set_state replaces the first four entries of the state; the trials are ours."""
    made = oracle(objective=keras_tuner.Objective("val_loss", "min"))
    state = made.get_state()
    for key in ("ongoing_trials", "retry_queue", "start_order", "end_order"):
        assert not state[key], key
    assert "trials" not in state
    assert "seconds" not in state
    for attribute in ("trials", "start_order", "end_order", "ongoing_trials", "tuner_ids"):
        assert hasattr(made, attribute), attribute
    trial = Trial(keras_tuner.HyperParameters(), "3")
    assert Trial.from_state(trial.get_state()).trial_id == "3"
