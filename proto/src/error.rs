//! Errors as users and protocols see them: an errno and a message that names the object.

use std::fmt;

use crate::pb;

/// Linux error numbers that FjordFS answers with; the discriminants are the ABI's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(i32)]
#[allow(missing_docs, reason = "the names are errno(3)'s")]
pub enum Errno {
    EPERM = 1,
    ENOENT = 2,
    EINTR = 4,
    EIO = 5,
    ENXIO = 6,
    E2BIG = 7,
    EBADF = 9,
    EAGAIN = 11,
    ENOMEM = 12,
    EACCES = 13,
    EFAULT = 14,
    EBUSY = 16,
    EEXIST = 17,
    EXDEV = 18,
    ENODEV = 19,
    ENOTDIR = 20,
    EISDIR = 21,
    EINVAL = 22,
    EFBIG = 27,
    ENOSPC = 28,
    EROFS = 30,
    EMLINK = 31,
    ERANGE = 34,
    EDEADLK = 35,
    ENAMETOOLONG = 36,
    ENOLCK = 37,
    ENOSYS = 38,
    ENOTEMPTY = 39,
    ELOOP = 40,
    ENODATA = 61,
    EPROTO = 71,
    EBADMSG = 74,
    EOVERFLOW = 75,
    EOPNOTSUPP = 95,
    ETIMEDOUT = 110,
    EHOSTUNREACH = 113,
    ESTALE = 116,
    EDQUOT = 122,
}

impl Errno {
    const ALL: [Errno; 38] = {
        use Errno::*;
        [
            EPERM,
            ENOENT,
            EINTR,
            EIO,
            ENXIO,
            E2BIG,
            EBADF,
            EAGAIN,
            ENOMEM,
            EACCES,
            EFAULT,
            EBUSY,
            EEXIST,
            EXDEV,
            ENODEV,
            ENOTDIR,
            EISDIR,
            EINVAL,
            EFBIG,
            ENOSPC,
            EROFS,
            EMLINK,
            ERANGE,
            EDEADLK,
            ENAMETOOLONG,
            ENOLCK,
            ENOSYS,
            ENOTEMPTY,
            ELOOP,
            ENODATA,
            EPROTO,
            EBADMSG,
            EOVERFLOW,
            EOPNOTSUPP,
            ETIMEDOUT,
            EHOSTUNREACH,
            ESTALE,
            EDQUOT,
        ]
    };

    /// The number of the ABI.
    pub fn code(self) -> i32 {
        self as i32
    }

    /// From a number on the wire; one that FjordFS does not use becomes `EIO`.
    pub fn from_code(code: i32) -> Errno {
        Errno::ALL.into_iter().find(|e| e.code() == code).unwrap_or(Errno::EIO)
    }
}

/// A failed operation: the errno a program gets, and the sentence a person gets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FsError {
    /// What the system call returns.
    pub errno: Errno,
    /// Names the object and says what to do.
    pub message: String,
}

/// Result of a filesystem operation.
pub type FsResult<T> = Result<T, FsError>;

impl FsError {
    /// An error with its message.
    pub fn new(errno: Errno, message: impl Into<String>) -> FsError {
        FsError { errno, message: message.into() }
    }

    /// As programs get it when there is nothing left to wait for: that a server cannot be reached is an I/O error to them.
    pub fn to_users(self) -> FsError {
        match self.errno {
            Errno::EHOSTUNREACH => FsError { errno: Errno::EIO, ..self },
            _ => self,
        }
    }
}

impl fmt::Display for FsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.message, self.errno)
    }
}

impl std::error::Error for FsError {}

impl From<FsError> for std::io::Error {
    fn from(e: FsError) -> Self {
        let kind = std::io::Error::from_raw_os_error(e.errno.code()).kind();
        std::io::Error::new(kind, e)
    }
}

impl From<FsError> for pb::meta::Error {
    fn from(e: FsError) -> Self {
        pb::meta::Error { errno: e.errno.code(), message: e.message }
    }
}

impl From<pb::meta::Error> for FsError {
    fn from(e: pb::meta::Error) -> Self {
        FsError::new(Errno::from_code(e.errno), e.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_errno_survives_the_wire() {
        for e in Errno::ALL {
            assert_eq!(Errno::from_code(e.code()), e);
        }
        assert_eq!(Errno::from_code(0), Errno::EIO);
        assert_eq!(Errno::from_code(9999), Errno::EIO);
    }
}
