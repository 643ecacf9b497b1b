"""Several processes as one training: who they are, what each takes and holds, what they agree on."""
