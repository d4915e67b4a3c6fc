"""keras-tuner internals without a public equivalent: the oracle's service for workers.

A test names the use that a new version of keras-tuner breaks.
"""

from typing import Any

import grpc
from keras_tuner.src import protos
from keras_tuner.src.distribute.oracle_chief import OracleServicer


def serve_oracle(server: grpc.Server, oracle: Any) -> Any:
    """Adds the oracle to a gRPC server; the result's `stop_triggered` is set after the last trial.

    The public way, `BaseTuner.search()` in the chief, blocks: nothing could watch the workers.
    """
    service = OracleServicer(oracle)
    protos.get_service_grpc().add_OracleServicer_to_server(service, server)
    return service
