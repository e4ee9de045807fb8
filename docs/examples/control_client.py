"""Watch a run from Python: its status, its workers, then its events.

The stubs are generated from the definitions, with `pip install grpcio grpcio-tools`:

    python3 -m grpc_tools.protoc -I proto --python_out=stubs --grpc_python_out=stubs proto/temper/v1/*.proto
    PYTHONPATH=stubs python3 docs/examples/control_client.py HOST:PORT

HOST:PORT is what `temper train` prints as "workers and control".
"""

import sys

import grpc
from temper.v1 import common_pb2, control_pb2, control_pb2_grpc


def main(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        control = control_pb2_grpc.ControlServiceStub(channel)
        status = control.Status(common_pb2.Empty(), timeout=10)
        state = control_pb2.RunState.Name(status.state)
        print(f"{status.run}: {state}, stage {status.stage}, step {status.step} of {status.num_steps}")
        for worker in control.Workers(common_pb2.Empty(), timeout=10).workers:
            print(f"  {worker.name} {worker.state} life {worker.incarnation} pid {worker.process_id}")
        for event in control.Watch(common_pb2.Empty()):
            print(event.name, event.json)


if __name__ == "__main__":
    main(sys.argv[1])
