# Which modules an initramfs lacks. Files in this order: names it holds, names that are wanted, the kernel's modules.dep. Variable show:
# "names" prints the wanted ones that the kernel has and the image lacks, "new" the paths of these and of what they need, "all" these and
# the paths of what it holds already. modules.dep names all that a module needs, not its direct needs only.
function word(path) {
    sub(/.*\//, "", path)
    sub(/\.ko(\.[a-z0-9]+)?$/, "", path)
    gsub(/-/, "_", path)
    return path
}
FNR == 1 { file++ }
file == 1 { held[word($1)] = 1; next }
file == 2 { wanted[word($1)] = 1; next }
{
    path = $1
    sub(/:$/, "", path)
    name = word(path)
    if (name in held) old[path] = 1
    else if (name in wanted) {
        lacking[name] = 1
        fresh[path] = 1
        for (i = 2; i <= NF; i++) if (!(word($i) in held)) fresh[$i] = 1
    }
}
END {
    if (show == "names") for (name in lacking) print name
    else {
        for (path in fresh) print path
        if (show == "all") for (path in old) print path
    }
}
