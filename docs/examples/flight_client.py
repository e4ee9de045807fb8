"""Read the trajectories of a run under way from Python, by Arrow Flight.

    pip install pyarrow
    python3 docs/examples/flight_client.py HOST:PORT [--follow]

HOST:PORT is what `temper train` prints as "workers and control". Exits with 77 where pyarrow is not installed.
"""

import json
import sys

try:
    import pyarrow.compute as pc
    import pyarrow.flight as flight
except ImportError as error:
    print(f"skipped: {error}", file=sys.stderr)
    sys.exit(77)


def print_rows(table) -> None:
    for step in sorted(set(table["step"].to_pylist())):
        rows = table.filter(pc.equal(table["step"], step))
        print(f"step {step}: {rows.num_rows} rows, mean reward {pc.mean(rows['reward']).as_py():.3f}", flush=True)


def main(address: str, follow: bool) -> None:
    client = flight.connect(f"grpc://{address}")
    # What there is: a ticket a step.
    for info in client.list_flights():
        name = info.descriptor.path[0].decode()
        print(f"{name}: {len(info.endpoints)} steps, {info.total_records} rows")
    # One step.
    info = client.get_flight_info(flight.FlightDescriptor.for_path("rollouts"))
    for endpoint in info.endpoints:
        print_rows(client.do_get(endpoint.ticket).read_all())
    # New steps as they are committed, until the run ends; batches come as they are read.
    if follow:
        ticket = flight.Ticket(json.dumps({"dataset": "rollouts", "follow": True}))
        for chunk in client.do_get(ticket):
            print(f"{chunk.data.num_rows} rows")


if __name__ == "__main__":
    main(sys.argv[1], "--follow" in sys.argv)
