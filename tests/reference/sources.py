"""Where the numbers of each shipped recipe are from."""

HY = "HY-SOAR's published settings for SD3.5 Medium"
GRPO = "Flow-GRPO, `{}` of its `config/grpo.py`, which names no length: `steps` are not from there"
NFT = "DiffusionNFT, `{}` of its `config/nft.py`; length {}"
SOURCES = {
    "flux-soar-lora": f"{HY}; rank, scale and targets of Flow-GRPO's `train_flux.py`; learning rate of ai-toolkit's and kohya's"
    " examples. We found no published run of SOAR on FLUX.1",
    "flux2-klein-soar-lora": f"{HY}; rank, learning rate and layers of DiffSynth-Studio's `FLUX.2-klein-base-4B.sh`. We found"
    " no published run of SOAR on FLUX.2",
    "quickstart": "ours, found by trying (figures in `README.md`)",
    "quickstart-rl": "ours, found by trying ([learning](learning.md#after-soar-quickstart-rl))",
    "qwen-image-grpo-pickscore": GRPO.format("pickscore_qwenimage"),
    "sana-sft-lora": "diffusers' `train_dreambooth_lora_sana.py` and its `README_sana.md`; `cond_dropout` is ours",
    "sana-soar-lora": f"{HY}, with the LoRA of diffusers' `train_dreambooth_lora_sana.py` at a larger rank. We found no published run of"
    " SOAR for SANA",
    "sd35l-soar-lora": "those of `sd35m-soar-lora`, at 1024 px. We found no published run of SOAR for Large",
    "sd35m-awm-geneval": "AWM, `geneval_sd3_no_cfg_1node` of its repository at 12b1397; the recipe names each published field. Ours:"
    " bf16, the solver, `steps`",
    "sd35m-dpo-lora": "`beta` of the Diffusion-DPO paper for Stable Diffusion 1.5; steps, batch and learning rate are ours, and were"
    " not tried on this model",
    "sd35m-grpo-fast": GRPO.format("pickscore_sd3_fast_nocfg"),
    "sd35m-grpo-geneval": GRPO.format("geneval_sd3"),
    "sd35m-grpo-ocr": GRPO.format("general_ocr_sd3"),
    "sd35m-grpo-pickscore": GRPO.format("pickscore_sd3"),
    "sd35m-nft-geneval": NFT.format("sd3_geneval", "as in the paper's table 2"),
    "sd35m-nft-multi": NFT.format("sd3_multi_reward", "of the first stage in the paper's appendix C"),
    "sd35m-nft-ocr": NFT.format("sd3_ocr", "as in the paper's table 2: 150 iterations of two steps"),
    "sd35m-nft-pickscore": NFT.format("sd3_pickscore", "as in the paper's table 2"),
    "sd35m-sft": f"{HY}, without its auxiliary points",
    "sd35m-sft-lora": "diffusers' `train_dreambooth_lora_sd3.py`; rank and targets of Flow-GRPO. Batch, steps, learning rate, warm-up,"
    " `cond_dropout` and EMA are ours",
    "sd35m-soar": f"{HY}, as its README has them: 8 GPUs of 4 images",
    "sd35m-soar-lora": f"{HY}, with the LoRA of Flow-GRPO and DiffusionNFT, and a larger learning rate",
    "sd35m-soar-then-grpo": "those of `sd35m-soar-lora`, then of `sd35m-grpo-pickscore`. We found no published run of the chain",
    "sd35m-soar-then-nft": "those of `sd35m-soar-lora`, then of `sd35m-nft-pickscore`. We found no published run of the chain",
    "shapes-awm": "ours, found by trying ([learning](learning.md))",
    "shapes-dpo": "ours, found by trying ([learning](learning.md))",
    "shapes-grpo": "ours, found by trying ([learning](learning.md))",
    "shapes-nft": "ours, found by trying ([learning](learning.md))",
    "tiny-pretrain": "ours; it made the shipped model ([Shapes](shapes.md))",
    "z-image-soar-lora": f"{HY}; rank, scale, targets and learning rate of DiffSynth-Studio's example. We found no published run of SOAR on"
    " Z-Image",
}  # fmt: skip
"""As the comments of the recipe say, and the published configuration that it names. A recipe without an entry is
an error."""
