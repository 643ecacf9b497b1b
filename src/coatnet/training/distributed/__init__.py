"""Several processes as one training: ranks and collectives, shards, and the network applied to them from outside."""
