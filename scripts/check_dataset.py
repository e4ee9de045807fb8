#!/usr/bin/env python3
"""Load a trajectory dataset with Hugging Face `datasets` and say what is in it.

Usage: check_dataset.py DIR

Exits 0 and prints one JSON object (rows, columns, mean reward) where every row loads, 1 with the cause where not, and
77 where the `datasets` package is not installed (the check was skipped).
"""

import json
import sys

SKIPPED = 77


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 1
    try:
        import datasets
    except ImportError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return SKIPPED
    dataset = datasets.load_from_disk(sys.argv[1])
    rewards = []
    for row in dataset:
        num_tokens = len(row["response_token_ids"])
        for column in ("response_mask", "rollout_log_probs", "old_log_probs", "advantages", "policy_version"):
            if row[column] is not None and len(row[column]) != num_tokens:
                print(f"{column} has {len(row[column])} entries for {num_tokens} tokens", file=sys.stderr)
                return 1
        if row["reward"] is not None:
            rewards.append(row["reward"])
    reward_mean = sum(rewards) / len(rewards) if rewards else None
    print(json.dumps({"rows": len(dataset), "columns": dataset.column_names, "reward_mean": reward_mean}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
