"""How well a model does: scores of closed answers, generated answers, and metrics of texts."""
