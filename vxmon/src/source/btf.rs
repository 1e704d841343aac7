//! Where the kernel keeps the fields that the program reads from an skb and its conntrack entry: offsets from the running
//! kernel's BTF. Only reads `/sys/kernel/btf`; what is missing there is told in words, and the program runs without it.

use std::path::Path;

use btf_rs::{Btf, Struct, Type};
use vxmon_common::{
    config::{Config, WINDOW, skb_access},
    conntrack::Tuple,
    translation,
};

/// BTF of the kernel proper.
const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
/// BTF of the conntrack module, where conntrack is one.
const CONNTRACK_MODULE: &str = "/sys/kernel/btf/nf_conntrack";

/// Tells the verifier what the program's context is, so that its fields can be read in place.
const CAST: &str = "bpf_cast_to_kern_ctx";

/// Why an offset is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// No BTF, or none that can be read.
    #[error("{path}: {reason}")]
    Unreadable {
        /// The file.
        path: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// A struct or member is not there.
    #[error("{0} is not in this kernel's BTF")]
    Missing(String),
    /// A struct is not laid out as the program reads it.
    #[error("{0} is laid out in a way that vxmon does not read")]
    Unexpected(&'static str),
}

/// What could be found out.
#[derive(Debug)]
pub struct Layout {
    /// Settings with the offsets filled in.
    pub config: Config,
    /// Number of the function `bpf_cast_to_kern_ctx()` in the kernel's BTF, if it has one.
    pub cast: Option<u32>,
    /// Why the skb's checksum state cannot be read, if so.
    pub skb: Result<(), LayoutError>,
    /// Why the skb's conntrack entry cannot be read, if so.
    pub conntrack: Result<(), LayoutError>,
}

impl Layout {
    /// Looks up everything on the running kernel.
    pub fn detect() -> Self {
        let mut config = Config::default();
        let (cast, skb, conntrack) = match open(VMLINUX, None) {
            Ok(btf) => (function(&btf, CAST), fill_skb(&btf, &mut config), fill_conntrack(&btf, &mut config)),
            Err(error) => {
                let why = LayoutError::Unreadable { path: VMLINUX, reason: error.to_string() };
                (None, Err(why), Err(error))
            }
        };
        config.has_skb = match (&skb, cast) {
            (Ok(()), Some(_)) => skb_access::CAST,
            (Ok(()), None) => skb_access::COPY,
            (Err(_), _) => skb_access::NONE,
        };
        config.has_conntrack = u32::from(conntrack.is_ok());
        Self { config, cast, skb, conntrack }
    }

    /// As if the kernel had no BTF.
    pub fn without(reason: &str) -> Self {
        let error = || LayoutError::Unreadable { path: VMLINUX, reason: reason.to_owned() };
        Self { config: Config::default(), cast: None, skb: Err(error()), conntrack: Err(error()) }
    }
}

fn open(path: &'static str, base: Option<&Btf>) -> Result<Btf, LayoutError> {
    let unreadable = |reason: String| LayoutError::Unreadable { path, reason };
    if !Path::new(path).exists() {
        return Err(unreadable("no such file (a kernel built without CONFIG_DEBUG_INFO_BTF?)".into()));
    }
    let btf = match base {
        None => Btf::from_file_with_backend(path, btf_rs::Backend::Mmap).or_else(|_| Btf::from_file(path)),
        Some(base) => Btf::from_split_file(path, base),
    };
    btf.map_err(|error| unreadable(error.to_string()))
}

/// The number of a function.
fn function(btf: &Btf, name: &str) -> Option<u32> {
    let mut ids = btf.resolve_ids_by_name(name).ok()?.into_iter();
    ids.find(|id| matches!(btf.resolve_type_by_id(*id), Ok(Type::Func(_))))
}

/// A struct and where its members are.
struct Members<'a> {
    btf: &'a Btf,
    name: &'static str,
    structure: Struct,
}

/// Position and size of a member, in bits from the struct's start.
struct Field {
    bit: u32,
    bits: Option<u32>,
    kind: Type,
}

impl Field {
    fn byte(&self) -> u32 {
        self.bit / 8
    }
}

impl<'a> Members<'a> {
    fn of(btf: &'a Btf, name: &'static str) -> Result<Self, LayoutError> {
        let missing = || LayoutError::Missing(format!("struct {name}"));
        let types = btf.resolve_types_by_name(name).map_err(|_| missing())?;
        let structure = types.into_iter().find_map(|kind| match kind {
            Type::Struct(structure) | Type::Union(structure) => Some(structure),
            _ => None,
        });
        Ok(Self { btf, name, structure: structure.ok_or_else(missing)? })
    }

    fn field(&self, member: &str) -> Result<Field, LayoutError> {
        find(self.btf, &self.structure, member, 0)
            .ok_or_else(|| LayoutError::Missing(format!("struct {}.{member}", self.name)))
    }

    /// A member of a member that is a struct.
    fn nested(&self, outer: &str, inner: &str) -> Result<Field, LayoutError> {
        let outer_field = self.field(outer)?;
        let found = match &outer_field.kind {
            Type::Struct(structure) | Type::Union(structure) => find(self.btf, structure, inner, outer_field.bit),
            _ => None,
        };
        found.ok_or_else(|| LayoutError::Missing(format!("struct {}.{outer}.{inner}", self.name)))
    }
}

/// Finds a member, also within anonymous structs and unions.
fn find(btf: &Btf, structure: &Struct, wanted: &str, base: u32) -> Option<Field> {
    for member in &structure.members {
        let bit = base + member.bit_offset();
        let name = btf.resolve_name(member).unwrap_or_default();
        let kind = || btf.resolve_chained_type(member).ok().and_then(|kind| resolve(btf, kind));
        if name == wanted {
            return Some(Field { bit, bits: member.bitfield_size().filter(|bits| *bits > 0), kind: kind()? });
        }
        if name.is_empty()
            && let Some(Type::Struct(inner) | Type::Union(inner)) = kind()
            && let Some(found) = find(btf, &inner, wanted, bit)
        {
            return Some(found);
        }
    }
    None
}

/// Follows typedefs and qualifiers to the type itself.
fn resolve(btf: &Btf, mut kind: Type) -> Option<Type> {
    for _ in 0..16 {
        kind = match &kind {
            Type::Typedef(inner) => btf.resolve_chained_type(inner).ok()?,
            Type::Volatile(inner) | Type::Const(inner) | Type::Restrict(inner) => {
                btf.resolve_chained_type(inner).ok()?
            }
            _ => return Some(kind),
        };
    }
    None
}

fn fill_skb(btf: &Btf, config: &mut Config) -> Result<(), LayoutError> {
    let skb = Members::of(btf, "sk_buff")?;
    let ip_summed = skb.field("ip_summed")?;
    if ip_summed.bits != Some(2) || ip_summed.bit % 8 > 6 {
        return Err(LayoutError::Unexpected("sk_buff.ip_summed"));
    }
    let [csum_start, csum_offset, end, head, data] =
        ["csum_start", "csum_offset", "end", "head", "data"].map(|name| skb.field(name).map(|field| field.byte()));
    let (csum_start, csum_offset, head, data) = (csum_start?, csum_offset?, head?, data?);
    let end_is_offset = matches!(skb.field("end")?.kind, Type::Int(int) if int.size() == 4);
    if !end_is_offset {
        return Err(LayoutError::Unexpected("sk_buff.end")); // a pointer, on 32-bit kernels
    }
    let end = end?;
    // Whole 8-byte words, so that the pointers stay aligned on the program's stack.
    let fields = [(ip_summed.byte(), 1), (csum_start, 2), (csum_offset, 2), (end, 4), (head, 8), (data, 8)];
    let start = fields.iter().map(|(at, _)| *at).min().unwrap_or(0) & !7;
    let len = fields.iter().map(|(at, size)| at + size).max().unwrap_or(0) - start;
    if len as usize > WINDOW {
        return Err(LayoutError::Unexpected("sk_buff"));
    }
    config.window_start = start;
    config.window_len = len;
    config.ip_summed = ip_summed.byte() - start;
    config.ip_summed_shift = ip_summed.bit % 8;
    config.csum_start = csum_start - start;
    config.csum_offset = csum_offset - start;
    config.end = end - start;
    config.head = head - start;
    config.data = data - start;
    config.gso_type = Members::of(btf, "skb_shared_info")?.field("gso_type")?.byte();
    Ok(())
}

fn fill_conntrack(vmlinux: &Btf, config: &mut Config) -> Result<(), LayoutError> {
    config.nfct = Members::of(vmlinux, "sk_buff")?.field("_nfct")?.byte();
    let module = conntrack_module(vmlinux)?;
    fill_entry(module.as_ref().unwrap_or(vmlinux), config)
}

/// The members of `struct nf_conn`; `btf` has it.
fn fill_entry(btf: &Btf, config: &mut Config) -> Result<(), LayoutError> {
    let entry = Members::of(btf, "nf_conn")?;
    let hash = Members::of(btf, "nf_conntrack_tuple_hash")?;
    check_tuple(btf)?;
    let tuple = hash.field("tuple")?.byte();
    let hashes = entry.field("tuplehash")?.byte();
    let hash_size =
        u32::try_from(hash.structure.size()).map_err(|_| LayoutError::Unexpected("nf_conntrack_tuple_hash"))?;
    config.tuple_orig = hashes + tuple;
    config.tuple_reply = hashes + hash_size + tuple;
    config.status = entry.field("status")?.byte();
    Ok(())
}

/// BTF of the conntrack module, if that has the structures.
fn conntrack_module(vmlinux: &Btf) -> Result<Option<Btf>, LayoutError> {
    if Members::of(vmlinux, "nf_conn").is_ok() {
        return Ok(None);
    }
    open(CONNTRACK_MODULE, Some(vmlinux)).map(Some)
}

/// Where the probe on NAT's set-up finds what it reads on the running kernel; it is to look at the network namespace with
/// this inode number.
pub fn translation(netns: u32) -> Result<translation::Config, LayoutError> {
    let vmlinux = open(VMLINUX, None)?;
    let module = conntrack_module(&vmlinux)?;
    let btf = module.as_ref().unwrap_or(&vmlinux);
    let mut conntrack = Config::default();
    fill_entry(btf, &mut conntrack)?;
    let entry = Members::of(btf, "nf_conn")?;
    Ok(translation::Config {
        netns,
        tuple_orig: conntrack.tuple_orig,
        tuple_reply: conntrack.tuple_reply,
        status: conntrack.status,
        net: entry.nested("ct_net", "net")?.byte(),
        inum: Members::of(&vmlinux, "net")?.nested("ns", "inum")?.byte(),
        zone: match entry.field("zone") {
            Ok(_) => entry.nested("zone", "id")?.byte(),
            Err(_) => translation::NO_OFFSET, // a kernel without CONFIG_NF_CONNTRACK_ZONES
        },
    })
}

/// Whether `struct nf_conntrack_tuple` is laid out as [`Tuple`] is.
fn check_tuple(btf: &Btf) -> Result<(), LayoutError> {
    const UNEXPECTED: LayoutError = LayoutError::Unexpected("nf_conntrack_tuple");
    let tuple = Members::of(btf, "nf_conntrack_tuple")?;
    let part = |side: &Field, member: &str| -> Result<u32, LayoutError> {
        let Type::Struct(structure) = &side.kind else {
            return Err(UNEXPECTED);
        };
        let field = find(btf, structure, member, side.bit);
        Ok(field.ok_or_else(|| LayoutError::Missing(format!("nf_conntrack_tuple….{member}")))?.byte())
    };
    let (src, dst) = (tuple.field("src")?, tuple.field("dst")?);
    let as_expected = tuple.structure.size() == size_of::<Tuple>()
        && part(&src, "u3")? == 0
        && part(&src, "u")? == 16
        && part(&src, "l3num")? == 18
        && part(&dst, "u3")? == 20
        && part(&dst, "u")? == 36
        && part(&dst, "protonum")? == 38;
    if as_expected { Ok(()) } else { Err(UNEXPECTED) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a kernel with BTF everything is found; elsewhere the reason names the file.
    #[test]
    fn finds_the_offsets_or_says_why_not() {
        let layout = Layout::detect();
        match &layout.skb {
            Ok(()) => {
                let config = layout.config;
                assert_eq!(config.csum_offset, config.csum_start + 2);
                assert!(config.data + 8 <= config.window_len);
            }
            Err(error) => assert!(error.to_string().contains(VMLINUX), "{error}"),
        }
    }

    /// What two look-ups have in common they agree on, and the rest lies behind the tuples as in every kernel so far.
    #[test]
    fn finds_what_the_probe_reads_or_says_why_not() {
        let layout = Layout::detect();
        match (translation(7), &layout.conntrack) {
            (Ok(found), Ok(())) => {
                let Config { tuple_orig, tuple_reply, status, .. } = layout.config;
                assert_eq!((found.netns, found.tuple_orig, found.tuple_reply), (7, tuple_orig, tuple_reply));
                assert!(found.status == status && found.net > status && found.inum > 0, "{found:?}");
                assert!(found.zone == translation::NO_OFFSET || found.zone < tuple_orig, "{found:?}");
            }
            (found, conntrack) => assert!(found.is_err() && conntrack.is_err(), "{found:?} {conntrack:?}"),
        }
    }
}
