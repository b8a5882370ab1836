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
SHARED: Final = "shared"
IMPLICIT: Final = "implicit"
CURVATURE: Final = "curvature"
PRIOR: Final = "prior"
OPTIMIZER: Final = "optimizer"  # Followed by a dot and the name of the state: "optimizer.exp_avg".
FITNESS: Final = "fitness"
SEED_LOG: Final = "seed-log"
FIRST_MOMENT: Final = "first-moment"
SECOND_MOMENT: Final = "second-moment"

# Entries of the request's config.
SERVER_ROUND: Final = "server-round"
LOCAL_UPDATE: Final = "local-update"
RHO: Final = "rho"
CONTINUAL: Final = "continual"
EXTRAPOLATE: Final = "extrapolate"
PROXIMAL_MU: Final = "proximal-mu"
DYN_ALPHA: Final = "dyn-alpha"
SHARED_DIGEST: Final = "shared-digest"
KEEP_SHARED: Final = "keep-shared"
PARTIAL: Final = "partial"
REFRESH: Final = "refresh"
INTERVAL: Final = "interval"
INNER_STEPS: Final = "inner-steps"
INIT_STEPS: Final = "init-steps"
LOWER_LR: Final = "lower-lr"
NU: Final = "nu"
KEEP_MOMENTS: Final = "keep-moments"
BETA: Final = "beta"
ETA: Final = "eta"
BY_EXAMPLES: Final = "by-examples"
MOMENTUM_NORM: Final = "momentum-norm"
MOMENTUM_ROUND: Final = "momentum-round"
TEMPERATURE: Final = "temperature"
KL_WEIGHT: Final = "kl-weight"
FIRST_PAIR: Final = "first-pair"
PAIRS: Final = "pairs"
FITNESS_METRIC: Final = "fitness-metric"
FITNESS_SHAPING: Final = "fitness-shaping"
CLIP: Final = "clip"
START_CHECKSUM: Final = "start-checksum"
CARRIED_ROUNDS: Final = "carried-rounds"

# Entries of the reply's metrics.
CLIENT_ID: Final = "client-id"
NUM_EXAMPLES: Final = "num-examples"
TRAIN_LOSS: Final = "train-loss"
TRAIN_SECONDS: Final = "train-seconds"
MOMENTUM_SQUARE: Final = "momentum-square"

# What Turnout tells clients on Flower's engines: which of their states counts.
RUN: Final = "turnout-run"
BASE_ROUND: Final = "base-round"
KEEP_ROUND: Final = "keep-round"
