from dataflex import ScoringSelector, register_selector


@register_selector("hard_but_short")
class HardButShort(ScoringSelector):
    """Rows with a high loss, less `price` for every target token."""

    needs_model = True  # it runs the model at a boundary

    def __init__(self, *args, price: float = 0.01, **kwargs):
        super().__init__(*args, **kwargs)
        self.price = price

    def scores(self, rows, *, ctx, **kwargs):
        losses = ctx.signals.losses(ctx.train_dataset, rows)
        return losses - self.price * ctx.signals.lengths(ctx.train_dataset)[rows]
