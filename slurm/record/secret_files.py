"""Which files of a tree are secrets by their name, or by what they hold: they have no place in a record that others may read."""

import fnmatch
import re
from pathlib import PurePath

NAMES = (
    # settings of shells, package indexes, data bases, registries, stores
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pypirc", ".npmrc", ".pgpass", ".my.cnf", ".htpasswd", ".git-credentials"),
    *(".s3cfg", ".boto", ".passwd-s3fs", "rclone.conf", ".dockercfg", ".dockerconfigjson", "auth.json", "kubeconfig", ".smbcredentials"),
    *(".vault-token", ".vault_pass*", ".terraformrc", "*.tfstate", "*.tfvars"),
    # private keys and where they are kept
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk", "*.pem", "*.key", "*.ppk"),
    *("*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.gpg"),
    # what people and services call them
    *("credentials", "credentials.*", "*credentials.json", "client_secret*.json", "service[-_]account*.json", "kaggle.json"),
    *("secret", "secrets", "secret.*", "secrets.*", ".secrets", "password", "passwords", "password.*", "passwords.*", "passwd"),
    *("token", ".token", "*.token", "token.json", "hf_token*", ".hf_token*", "*huggingface_token*", "*wandb_token*"),
    *("*github_token*", "*api_key", "*api_key.*", "*api_keys", "*api_keys.*", "*apikey", "*apikey.*", "*api-key", "*api-key.*"),
)
"""Patterns of file names, lower case, without what an editor adds to them."""
PLACES = (
    *(".aws", ".azure", ".docker", ".gcloud", ".gnupg", ".huggingface", ".kaggle", ".kube", ".modal", ".password-store"),
    *(".secrets", ".ssh"),
)
"""Directories whose files are secrets whatever their names."""
NO_SECRETS = ("*.example", "*.sample", "*.template", "*.dist", "*.pub", "*.py", "*.md")
"""Names that would fit, of files that show what a secret one looks like, or that are code."""
COPIES = (
    r"(?P<of>.+?)(\.~\d+)?~",  # Emacs, Vim, nano: .env~, .env.~3~
    r"(?P<of>.+)\.un",  # what is left of Vim's undo file, .env.un~, without its tilde
    r"(?P<of>.+)\.(sw[a-z]|kate-swp|s[uv][a-z])",  # Vim and Kate: .env.swp, .id_rsa.swo
    r"#(?P<of>.+)#",  # Emacs: #.env#
    r"\.#(?P<of>.+)",  # Emacs, while a file is open: .#id_rsa
    r"(?P<of>.+?)[-._ ](bak|backup|old|orig|save|saved|copy|rej|tmp|temp|prev|disabled|txt|gz|bz2|xz|zst|zip)[-._]?\d*",
    r"(?P<of>.+?)[-._]\d+",  # dates and counts: .env.1, id_rsa-20261125
    r"(?P<of>.+?) ?(\((another |\d+\w\w )?copy( \d+)?\)|\(\d+\)| copy \d+)",  # file managers: id_rsa (copy)
    r"copy of (?P<of>.+)",
)
"""How editors and people name a copy of the file `of`, lower case."""

_NAMES, _NO_SECRETS = (re.compile("|".join(map(fnmatch.translate, patterns))) for patterns in (NAMES, NO_SECRETS))
_COPIES = tuple(re.compile(pattern) for pattern in COPIES)

_ARMOR = rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
_BREAK = rb"(?:\s|\\[nrt]|[\"'#>+\\])+"
# A marker alone is code that looks for keys; a key goes on with headers (Proc-Type: 4,ENCRYPTED) and a line of base64.
_KEYS = re.compile(
    rb"|".join(
        (
            _ARMOR + _BREAK + rb"(?:[A-Za-z-]+: [^\n\\]*" + _BREAK + rb")*[A-Za-z0-9+/=]{40}",
            rb"^PuTTY-User-Key-File-\d+: ",
            rb"AGE-SECRET-KEY-[A-Z0-9-]{40}",
        )
    ),
    re.MULTILINE,
)
_VIM_SWAP = b"b0VIM "
_MARKER = re.compile(_ARMOR)


def is_secret_by_name(name: str) -> bool:
    """Whether the file at the relative path `name`, or what it is a copy of, is well known to hold a secret."""
    path = PurePath(name.lower())
    if any(part in PLACES for part in path.parts[:-1]):
        return True
    originals = _originals(path.name)
    return any(map(_NAMES.match, originals)) and not any(map(_NO_SECRETS.match, originals))


def _originals(name: str) -> set[str]:
    """`name` and every name of which it may be a copy, or a copy of a copy. Of `.id_rsa.swp`: also `id_rsa`."""
    found: set[str] = set()
    waiting = {name}
    while waiting:
        found |= waiting
        matches = [match["of"] for one in waiting for pattern in _COPIES if (match := pattern.fullmatch(one))]
        waiting = {original for match in matches for original in (match, match.removeprefix(".")) if original} - found
    return found


def is_secret_by_content(content: bytes) -> bool:
    """Whether a private key stands anywhere in it: PEM, OpenSSH, PGP, PuTTY or age; escaped, as in JSON, or indented, too."""
    # A swap file of Vim has its lines in another order: there the marker is enough.
    return bool(_KEYS.search(content) or (content.startswith(_VIM_SWAP) and _MARKER.search(content)))
