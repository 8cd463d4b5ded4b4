class GenerationMixin: pass
