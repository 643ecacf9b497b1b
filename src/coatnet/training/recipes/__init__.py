"""Named recipes: `scratch` and `finetune` for data of one's own, and the paper's (Table 10)."""
