"""Families that are refused, each with what is missing. Of what `models.obstacles` finds in any model by
itself only the best known are named here."""

from __future__ import annotations

from vfl_train.models.families.family import Family

# Fuyu begins an answer behind every text with an image, Chameleon ends the user's turn behind every text.
ENDS_EVERY_TEXT = Family(
    refused="the processor ends every text as a prompt, so that no answer can be encoded behind a question"
)
LINEAR_ATTENTION = Family(
    refused="most decoder layers are linear attention and carry an image on in a state, where nothing of it "
    "can be dropped or swapped"
)
SEVERAL_STATES = Family(
    refused="a token has four hidden states between decoder layers, where interventions know one"
)
DIFFUSION = Family(refused="answers are written in blocks by diffusion, not one token after the other")
REFUSED = {
    "chameleon": ENDS_EVERY_TEXT,
    "diffusion_gemma": DIFFUSION,
    "fuyu": ENDS_EVERY_TEXT,
    "gemma3n": SEVERAL_STATES,
    "qwen3_5": LINEAR_ATTENTION,
    "qwen3_5_moe": LINEAR_ATTENTION,
}
