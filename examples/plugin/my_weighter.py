"""A weighter of your own, outside the package: short answers count more."""

from dataflex import SampleWeighter, register_weighter


@register_weighter("short_first")
class ShortFirst(SampleWeighter):
    """Weight 1 / (number of target tokens)^power, scaled to mean 1 over the micro-batch on all ranks."""

    def __init__(self, power: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.power = power

    def sample_weights(self, losses, *, ctx, model, inputs):
        lengths = ctx.step.meta.counts.to(losses)
        everywhere = ctx.gather_samples(lengths.pow(-self.power))
        return ctx.own_part(everywhere / everywhere.mean())
