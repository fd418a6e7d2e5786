"""The scores against labels, in the order in which they are shown."""

SCORE_NAMES = ("acc", "nmi", "ari")
