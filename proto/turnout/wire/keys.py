"""Names of the records and entries that travel between server and client (kebab-case on every engine)."""

from __future__ import annotations

from typing import Final

# Records of a message.
ARRAYS: Final = "arrays"
CONFIG: Final = "config"
METRICS: Final = "metrics"
GRADIENT: Final = "gradient"
BULLSEYE: Final = "bullseye"
CONTROL: Final = "control"
INITIAL: Final = "initial"
FITNESS: Final = "fitness"
SEED_LOG: Final = "seed-log"
MOMENTS: Final = ("first-moment", "second-moment")
OPTIMIZER: Final = "optimizer."  # Followed by the name of the state: "optimizer.exp_avg".

# Entries of the request's config.
SERVER_ROUND: Final = "server-round"
LOCAL_UPDATE: Final = "local-update"
RHO: Final = "rho"
CONTINUAL: Final = "continual"
EXTRAPOLATE: Final = "extrapolate"
PROXIMAL_MU: Final = "proximal-mu"
DYN_ALPHA: Final = "dyn-alpha"
FIRST_PAIR: Final = "first-pair"
PAIRS: Final = "pairs"
FITNESS_METRIC: Final = "fitness-metric"
CLIP: Final = "clip"
START_CHECKSUM: Final = "start-checksum"
CARRIED_ROUNDS: Final = "carried-rounds"

# Entries of the reply's metrics.
CLIENT_ID: Final = "client-id"
NUM_EXAMPLES: Final = "num-examples"
TRAIN_LOSS: Final = "train-loss"
TRAIN_SECONDS: Final = "train-seconds"
