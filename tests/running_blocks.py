"""A pack that runs the U-Net's blocks by itself, as those that cache some of them do."""

import torch


def run_blocks(base, _apply_model, args):
    """What cache packs do: the U-Net's blocks one after the other, without apply_model and without forward."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding

    x, sigma, c = args["input"], args["timestep"], args["c"]
    unet, options = base.diffusion_model, c["transformer_options"]
    h = base.model_sampling.calculate_input(sigma, x)
    time = base.model_sampling.timestep(sigma).float()
    emb = unet.time_embed(timestep_embedding(time, unet.model_channels).to(h.dtype))
    skips = []
    for number, block in enumerate(unet.input_blocks):
        options["block"] = ("input", number)
        h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options)
        skips.append(h)
    options["block"] = ("middle", 0)
    h = forward_timestep_embed(unet.middle_block, h, emb, c["c_crossattn"], options)
    for number, block in enumerate(unet.output_blocks):
        options["block"] = ("output", number)
        h = torch.cat([h, skips.pop()], 1)
        h = forward_timestep_embed(block, h, emb, c["c_crossattn"], options, skips[-1].shape if skips else None)
    return base.model_sampling.calculate_denoised(sigma, unet.out(h), x)


def cached(model, function=run_blocks):
    clone = model.clone()
    base = clone.model
    # a function: older versions copy a model's options deeply, and with a bound method the model it is bound to
    clone.set_model_unet_function_wrapper(lambda apply_model, args: function(base, apply_model, args))
    return clone
