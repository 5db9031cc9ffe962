"""MATHEMATICS: tensors in, tensors out. No file, cluster, clock or environment is touched here.

Paper: Ramesh et al. 2021, "Zero-Shot Text-to-Image Generation" (arXiv 2102.12092). A stage of the paper is a file:

    tokenizer.py       what every picture tokenizer offers: encode, decode
    dvae.py            stage one, the discrete VAE            §2.1, App. A.1, A.2
    likelihood.py      the logit-Laplace, dense and in bits   App. A.3
    openai_weights.py  the published dVAE's weights under our names
    text.py            captions to tokens                     §2.2
    attention.py       row, column and convolutional masks    App. B.1
    transformer.py     stage two, text and codes              §2.2, App. B
    blocks.py          a block recomputed, or compiled
    sampling.py        pictures from a prompt                 §2.6
    schedules.py, optimizer.py, ema.py                        App. A.2, B.2

The letters that end a name are its shape, one letter an axis (`codes_BN`, `logits_BVhw`):

    B  pictures or captions of a batch
    T  text positions (BOS, tokens, EOS, pads)
    N  image positions in raster order, N = h·w
    S  all positions of the transformer, S = T + N
    H, W  height and width in pixels;  h, w  in codes
    C  channels (of a picture: red, green, blue)
    V  vocabulary (of the codes, or of the text where the name says so)
    D  width of a state
    K  attention heads;  E  width of one head, D = K·E
    M  rows of any origin (a flattened batch)
"""
